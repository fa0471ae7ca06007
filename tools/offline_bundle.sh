#!/usr/bin/env bash
# Prepares, on a machine with a network, all that a cluster node without one needs to run this package beside
# its own Python and torch; assemble.sh, which goes along, puts it together there.
#
#   tools/offline_bundle.sh --torch 2.11.0 bundle/             # with Transformer Engine, for CUDA 13
#   tools/offline_bundle.sh --have freeze.txt bundle/          # nothing that the node has: its `pip freeze`
#   tools/offline_bundle.sh --torch 2.13.0 --without-te bundle/
#
# --python PYTHON      a Python of the node's minor version [python3]
# --torch VERSION      the node's torch [constraints/gpu.txt's]
# --have FILE          name==version a line: what the node has, its torch among it
# --without-te         no Transformer Engine (CPU nodes)
# --te-wheel FILE      an extension built before, instead of half an hour of CPU time
# --extra REQUIREMENT  one more package, or a wheel's path; may be given again
# --part-mib N         size of a part [1900]
# --work FOLDER        scratch, kept: a second run is quick [OUT.work]
#
# Run it on the node's kind of machine (x86-64 Linux, glibc no newer): pip takes the wheels that run here.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)

fail() { echo "error: $*" >&2; exit 2; }
pinned() { sed -n "s/^$1==//p" "$root/constraints/gpu.txt"; }
say() { printf '== %s\n' "$*"; }

python=python3 torch='' have='' with_te=1 te_wheel='' part_mib=1900 out='' work='' extras=()
while [[ $# -gt 0 ]]; do
  case $1 in
    --python) python=${2:?--python needs an interpreter}; shift ;;
    --torch) torch=${2:?--torch needs a version}; shift ;;
    --have) have=${2:?--have needs a file}; shift ;;
    --without-te) with_te=0 ;;
    --te-wheel) te_wheel=$(realpath -e "${2:?--te-wheel needs a file}"); shift ;;
    --extra) extras+=("${2:?--extra needs a requirement}"); shift ;;
    --part-mib) part_mib=${2:?--part-mib needs a number}; shift ;;
    --work) work=${2:?--work needs a folder}; shift ;;
    --help) sed -n '2,/^set /s/^# \{0,1\}//p' "$0" | sed '$d'; exit 0 ;;
    -*) fail "$1: no such option; --help shows them" ;;
    *) [[ -z $out ]] || fail "one folder, not $out and $1"; out=$1 ;;
  esac
  shift
done
[[ -n $out ]] || fail "which folder shall the parts go to? --help shows the options"
[[ $part_mib =~ ^[1-9][0-9]*$ ]] || fail "--part-mib $part_mib is no number of MiB"
[[ -z $have || -f $have ]] || fail "--have $have: no such file; make it on the node: python3 -m pip freeze > $have"
out=$(realpath -m "$out") work=$(realpath -m "${work:-$out.work}")
mkdir -p "$out" "$work"
if [[ -z $torch && -n $have ]]; then torch=$(sed -n 's/^torch==\([^+ ]*\).*/\1/p' "$have"); fi
torch=${torch:-$(pinned torch)}

say "a Python that believes to have what the node has"
rm -rf "$work/node" "$work/wheels" && mkdir -p "$work/wheels"
"$python" -m venv "$work/node"
pip() { "$work/node/bin/python" -m pip --disable-pip-version-check "$@"; }
"$work/node/bin/python" "$root/tools/pretend_installed.py" ${have:+"$have"} "torch==$torch"

say "wheels: ours"
wanted=()
# From a copy: a build folder of the checkout may hold modules that are no more.
rm -rf "$work/source" && mkdir "$work/source"
cp -R "$root"/{setup.py,pyproject.toml,README.md,LICENSE,xdlm_megatron} "$work/source/"
pip wheel --quiet --no-deps --wheel-dir "$work/wheels" "$work/source"
wanted+=("$(ls "$work"/wheels/xdlm_megatron-*.whl)")
for extra in ${extras[@]+"${extras[@]}"}; do wanted+=("$extra"); done

if ((with_te)); then
  version=$(pinned transformer-engine)
  if [[ -z $te_wheel ]]; then
    say "Transformer Engine's extension for torch $torch: half an hour of CPU time"
    [[ -x $work/te/bin/python ]] || "$python" -m venv "$work/te"
    "$work/te/bin/python" -m pip --disable-pip-version-check install --quiet "torch==$torch" numpy
    PATH="$work/te/bin:$PATH" bash "$root/tools/build_te_extension.sh" "$work/te_wheels" "$version"
    te_wheel=$(ls "$work"/te_wheels/transformer_engine_torch-"$version"-*.whl)
  fi
  wanted+=("$te_wheel" "transformer-engine[core-cu13,pytorch]==$version")
fi

say "wheels: what is missing there"
# Resolved as on the node, then fetched by exact version. Its packages stay as they are.
pip install --quiet --dry-run --report "$work/report.json" --constraint <(echo "torch==$torch"; grep '^megatron-core==' "$root/constraints/gpu.txt") \
  "${wanted[@]}"
"$work/node/bin/python" - "$work/report.json" > "$work/requirements.txt" << 'PY'
import json, sys
for item in json.load(open(sys.argv[1]))["install"]:
    print(item["metadata"]["name"] + "==" + item["metadata"]["version"])
PY
pip download --quiet --no-deps --only-binary=:all: --dest "$work/wheels" --find-links "$work/wheels" \
  ${te_wheel:+--find-links "$(dirname "$te_wheel")"} --requirement "$work/requirements.txt"

say "parts of at most $part_mib MiB"
rm -rf "$work/bundle" && mkdir "$work/bundle"
mv "$work/wheels" "$work/requirements.txt" "$work/bundle/"
# Recipes, tools, tests, benchmarks; not the package, which would hide the installed one and its kernels.
tar -C "$root" --sort=name --owner=0 --group=0 --exclude='__pycache__' -cf "$work/bundle/source.tar" \
  Makefile pyproject.toml LICENSE README.md constraints docs examples slurm tools benchmarks tests
"$work/node/bin/python" -c 'import platform, sys; print(*sys.version_info[:2], platform.machine(), sys.argv[1])' \
  "$torch" > "$work/bundle/made_for"
rm -f "$out"/bundle.tar.* "$out/SHA256SUMS"
tar -C "$work/bundle" --sort=name --owner=0 --group=0 -cf - . | split --bytes "${part_mib}M" --numeric-suffixes --suffix-length 3 - "$out/bundle.tar."
cp "$root/tools/assemble.sh" "$out/assemble.sh"
(cd "$out" && sha256sum bundle.tar.* > SHA256SUMS)
(cd "$out" && ls -lh)
say "copy $out to the node and run there: bash assemble.sh ENVIRONMENT"
