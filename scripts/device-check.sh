#!/usr/bin/env bash
# Runs an engine of a bundle through everything on this device, and collects one JSON file to send back.
set -u

usage() {
  cat <<'TEXT'
Usage: device-check.sh [-o FILE] [-w FOLDER] [-t TARGET] [-p MIN,OPT,MAX] [-n] BUNDLE

Builds the plugin and an engine of BUNDLE here, holds the engine against the golden values in the bundle
(mmm-export onnx --golden writes them), times it, and writes what came out to one JSON file.

  -o FILE          result; default device-check.json
  -w FOLDER        engine and logs; default device-check, kept afterwards
  -t TARGET        of mmm-export trt; default auto
  -p MIN,OPT,MAX   prefill tokens of the engine; default 1,512,2048
  -n               only print the commands

MMM_EXPORT names the program, default mmm-export. The JSON holds versions, the GPU, logs and paths, nothing of the weights.
Exit code: 0 all steps passed, 1 one did not, 2 wrong usage.
TEXT
}

result=device-check.json folder=device-check target=auto prefill=1,512,2048 dry=
while getopts "o:w:t:p:nh" option; do
  case $option in
    o) result=$OPTARG ;;
    w) folder=$OPTARG ;;
    t) target=$OPTARG ;;
    p) prefill=$OPTARG ;;
    n) dry=1 ;;
    h) usage; exit 0 ;;
    *) usage >&2; exit 2 ;;
  esac
done
shift $((OPTIND - 1))
if [ $# -ne 1 ]; then
  usage >&2
  exit 2
fi
bundle=$1
read -ra program <<<"${MMM_EXPORT:-mmm-export}"
engine=$folder/engine
failed=0

# step NAME COMMAND...: run it, keep its output, exit code and seconds.
step() {
  local name=$1 begin code
  shift
  if [ -n "$dry" ]; then
    printf '%s:' "$name"
    printf ' %q' "$@"
    printf '\n'
    return 0
  fi
  printf '== %s\n' "$name" >&2
  begin=$SECONDS
  "$@" 2>&1 >"$folder/$name.out" | tee "$folder/$name.err" >&2
  code=${PIPESTATUS[0]}
  printf '%s\n' "$code" >"$folder/$name.code"
  printf '%s\n' $((SECONDS - begin)) >"$folder/$name.seconds"
  printf '%q ' "$@" >"$folder/$name.command"
  if [ "$code" -ne 0 ]; then
    failed=1
    printf 'device-check: %s failed with exit code %s, see %s\n' "$name" "$code" "$folder/$name.err" >&2
  fi
  return "$code"
}

if [ -z "$dry" ]; then
  if [ ! -f "$bundle/manifest.json" ]; then
    printf 'device-check: %s is no bundle: it has no manifest.json\n' "$bundle" >&2
    exit 2
  fi
  mkdir -p "$folder" || exit 2
  rm -f "$folder"/*.out "$folder"/*.err "$folder"/*.code "$folder"/*.seconds "$folder"/*.command "$folder/bench.json"
fi

step doctor "${program[@]}" doctor --json
step plugins "${program[@]}" plugins build
if step trt "${program[@]}" trt "$bundle" -o "$engine" --target "$target" --prefill-tokens "$prefill" --force; then
  step verify "${program[@]}" verify "$engine"
  step bench "${program[@]}" bench "$engine" --lengths 512,2K,8K --json "$folder/bench.json"
fi
[ -n "$dry" ] && exit 0

python3 - "$folder" "$bundle" "$engine" "$result" <<'PYTHON' || exit 1
import json, os, platform, sys, time

folder, bundle, engine, result = sys.argv[1:]
LONGEST = 20000  # characters of one output


def text(name):
    try:
        with open(os.path.join(folder, name), encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def data(path):
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError):
        return None


def manifest(path):
    found = data(os.path.join(path, "manifest.json"))
    return {key: value for key, value in found.items() if key not in ("plans", "graphs", "files")} if found else None


steps = []
for name in ("doctor", "plugins", "trt", "verify", "bench"):
    code = text(name + ".code").strip()
    row = {"name": name, "exit_code": int(code) if code else None}
    if code:
        row["command"] = text(name + ".command").strip()
        row["seconds"] = int(text(name + ".seconds"))
        row["output"] = text(name + ".out")[-LONGEST:]
        row["errors"] = text(name + ".err")[-LONGEST:]
    steps.append(row)
report = {
    "what": "device-check",
    "schema": 1,
    "date": time.strftime("%Y-%m-%d", time.gmtime()),
    "machine": platform.machine(),
    "system": " ".join((platform.system(), platform.release())),
    "passed": all(row["exit_code"] == 0 for row in steps),
    "steps": steps,
    "doctor": data(os.path.join(folder, "doctor.out")),
    "bundle": manifest(bundle),
    "engine": manifest(engine),
    "bench": data(os.path.join(folder, "bench.json")),
}
with open(result, "w", encoding="utf-8") as file:
    json.dump(report, file, indent=1)
    file.write("\n")
PYTHON
printf 'wrote %s\n' "$result" >&2
exit "$failed"
