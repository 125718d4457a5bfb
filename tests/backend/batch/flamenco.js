// A stand-in for Flamenco Manager: compiles a job as it does, with its globals and nothing else, and says what came out.
// node flamenco.js SCRIPT SETTINGS.json. What it refuses is what Flamenco 3.3 and later refuses (job_compilers/author.go, AvailableJobSetting of
// its API), and what its worker's commands could not use (the tables of "List of Commands" in its manual).
"use strict";
const fs = require("fs");
const path = require("path");
const vm = require("vm");

const KEYS = ["key", "type", "subtype", "choices", "propargs", "description", "label", "default", "eval", "evalInfo", "visible", "required", "editable"];
const TYPES = { string: "string", int32: "number", float: "number", bool: "boolean" };
const SUBTYPES = ["file_path", "dir_path", "file_name", "hashed_file_path"];
const VISIBLE = ["visible", "hidden", "submission", "web"];
const TASK_TYPES = ["blender", "ffmpeg", "file-management", "misc"]; // that a worker takes unless it is told otherwise
const COMMANDS = {
    exec: { exe: "string", args: "strings" },
    echo: { message: "string" },
    sleep: { duration_in_seconds: "number" },
    "blender-render": { exe: "string", exeArgs: "string", argsBefore: "strings", blendfile: "string", args: "strings" },
    "make-directory": { path: "string" },
    "move-directory": { src: "string", dest: "string" },
    "copy-file": { src: "string", dest: "string" },
};

function refuse(words) {
    throw new Error(words);
}

function is(type, value) {
    return type === "strings" ? Array.isArray(value) && value.every((one) => typeof one === "string") : typeof value === type;
}

class Task {
    constructor(name, type) {
        Object.assign(this, { name, type, commands: [], dependencies: [] });
    }
    addCommand(command) {
        if (!(command instanceof Command)) refuse(`${this.name}: addCommand takes what author.Command made`);
        this.commands.push(command);
    }
    addDependency(task) {
        if (!(task instanceof Task)) refuse(`${this.name}: addDependency takes a task`);
        this.dependencies.push(task.name);
    }
}

class Command {
    constructor(name, parameters) {
        Object.assign(this, { name, parameters });
    }
}

const author = {
    Task(name, type) {
        if (typeof name !== "string" || !name.trim()) refuse("author.Task(name, type): name is required");
        if (!TASK_TYPES.includes(type)) refuse(`no worker takes tasks of type ${type}`);
        return new Task(name, type);
    },
    Command(name, parameters) {
        const known = COMMANDS[name] || refuse(`workers know no command ${name}`);
        for (const [key, value] of Object.entries(parameters)) {
            if (!known[key] || !is(known[key], value)) refuse(`${name} takes no ${key} ${JSON.stringify(value)}`);
        }
        return new Command(name, parameters);
    },
};

function checkSetting(setting) {
    const { key, type } = setting;
    for (const name of Object.keys(setting)) if (!KEYS.includes(name)) refuse(`${key}: a setting has no ${name}`);
    if (!/^[a-z_]+$/.test(key)) refuse(`${key} is no key`); // it names a property in Blender
    if (!TYPES[type]) refuse(`${key}: no type ${type}`);
    if (setting.subtype && !(type === "string" && SUBTYPES.includes(setting.subtype))) refuse(`${key}: no subtype ${setting.subtype}`);
    if (setting.visible && !VISIBLE.includes(setting.visible)) refuse(`${key}: visible cannot be ${setting.visible}`);
    if (setting.choices && !(type === "string" && is("strings", setting.choices) && setting.choices.every(Boolean))) refuse(`${key}: choices`);
    if (setting.default !== undefined && typeof setting.default !== TYPES[type]) refuse(`${key}: the default is no ${type}`);
    if (setting.choices && setting.default !== undefined && !setting.choices.includes(setting.default)) refuse(`${key}: the default is no choice`);
    if (setting.eval !== undefined && typeof setting.eval !== "string") refuse(`${key}: eval is no text`);
}

const [script, given] = process.argv.slice(2);
const none = () => undefined;
const context = vm.createContext({
    author, print: none, alert: none, frameChunker: none, formatTimestampLocal: none,
    path: { join: path.posix.join, basename: path.posix.basename, dirname: path.posix.dirname },
});
vm.runInContext(`"use strict";${fs.readFileSync(script, "utf8")}`, context, { filename: script }); // Flamenco compiles in strict mode
const jobType = vm.runInContext("JOB_TYPE", context);
for (const name of Object.keys(jobType)) if (!["label", "settings"].includes(name)) refuse(`a job type has no ${name}`);
jobType.settings.forEach(checkSetting);

const settings = {};
for (const { key, default: value } of jobType.settings) if (value !== undefined) settings[key] = value;
Object.assign(settings, JSON.parse(fs.readFileSync(given, "utf8")));
for (const { key, required } of jobType.settings) if (required && settings[key] === undefined) refuse(`${key} is required`);

const tasks = [];
const job = { name: "job", settings, addTask: (task) => (task instanceof Task ? tasks.push(task) : refuse("addTask takes a task")) };
vm.runInContext("compileJob", context)(job);
console.log(JSON.stringify({ jobType, tasks }));
