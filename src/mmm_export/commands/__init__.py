"""The commands of `mmm-export`, one a file: parse, call one stage, print. Each imports its stage when it runs."""
