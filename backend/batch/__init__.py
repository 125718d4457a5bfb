"""Many assets in one command: manifests, the run, engines that compute, Blenders that capture, and the report. A client of the backend."""
