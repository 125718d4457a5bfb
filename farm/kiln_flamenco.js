// SPDX-License-Identifier: GPL-3.0-or-later
// Kiln's job type for Flamenco 3.3 and later: a batch whose items are dealt out to tasks, and a last task that writes the joint report.
// Copy it into the folder `scripts` beside flamenco-manager; docs/farm.md tells what the workers need.

const AS_LISTED = "as listed";

const JOB_TYPE = {
    label: "Kiln Batch",
    settings: [
        { key: "manifest", type: "string", subtype: "file_path", required: true, eval: "bpy.data.filepath",
          evalInfo: { showLinkButton: true, description: "The open file" },
          description: "List (.toml or .csv), folder or .blend file, on storage that all workers share" },
        { key: "out", type: "string", subtype: "dir_path", required: true,
          description: "Folder of the results, on storage that all workers share" },
        { key: "tasks", type: "int32", default: 4, propargs: { min: 1, max: 1000 }, visible: "submission",
          description: "Number of tasks that the items are dealt out to; each runs on one worker at a time" },
        { key: "preset", type: "string", choices: [AS_LISTED, "draft", "standard", "high"], default: AS_LISTED,
          description: "Over what the list says" },
        { key: "fbx", type: "bool", default: false, description: "An FBX beside each GLB" },
        { key: "library", type: "string", subtype: "file_path", default: "", description: "Asset library (.blend) to put all results into; may be empty" },

        // Where the workers find both: paths, or variables of Flamenco Manager, which differ by platform.
        { key: "kiln", type: "string", required: true, default: "kiln", visible: "submission", description: "The command `kiln` on the workers, such as {kiln}" },
        { key: "blender", type: "string", default: "{blender}", visible: "submission", description: "Blender on the workers; empty: Kiln looks for one" },
    ],
};

function compileJob(job) {
    const settings = job.settings;
    const count = settings.tasks;
    if (!(count >= 1)) {
        throw `The number of tasks is ${count}; it has to be 1 or more.`;
    }

    const report = author.Task("report", "blender");
    for (let number = 1; number <= count; number++) {
        const task = author.Task(`items-${number}-of-${count}`, "blender");
        task.addCommand(kiln(settings, ["--shard", `${number}/${count}`]));
        job.addTask(task);
        report.addDependency(task);
    }
    // The same without a shard: it finds the items finished or failed, reports on them all, and fails if one of them did.
    report.addCommand(kiln(settings, settings.library ? ["--library", settings.library] : []));
    job.addTask(report);
}

function kiln(settings, more) {
    const args = ["batch", settings.manifest, "--out", settings.out];
    if (settings.preset && settings.preset !== AS_LISTED) {
        args.push("--preset", settings.preset);
    }
    if (settings.fbx) {
        args.push("--fbx");
    }
    if (settings.blender) {
        args.push("--blender", settings.blender);
    }
    return author.Command("exec", { exe: settings.kiln, args: args.concat(more) });
}
