"""From a bundle to an engine folder: graphs lowered for a target, a plan of memory and speed, and the build itself."""
