#!/usr/bin/env bash
# On a node without network: checks the parts that tools/offline_bundle.sh made, which lie beside this script,
# and installs them beside what PYTHON has.
#
#   bash assemble.sh ENVIRONMENT              a virtual environment that sees PYTHON's packages, its torch too
#   bash assemble.sh --target FOLDER          only a folder for PYTHONPATH, where there is no venv
#
# PYTHON=python3 names the interpreter. Recipes, tools and benchmarks come to xdlm_megatron_source in it.
# Exit status 3: parts are missing, and the message says which; call again once they are there.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}

fail() { echo "error: $*" >&2; exit 2; }

is_target=0
if [[ ${1:-} == --target ]]; then is_target=1; shift; fi
[[ $# -eq 1 && $1 != -* ]] || { sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 2; }
where=$(realpath -m "$1")

cd "$here"
[[ -f SHA256SUMS ]] || fail "$here/SHA256SUMS is missing; copy all that offline_bundle.sh wrote"
missing=$(while read -r _ name; do [[ -f $name ]] || printf ' %s' "$name"; done < SHA256SUMS)
[[ -z $missing ]] || { echo "error: parts are missing in $here:$missing" >&2; exit 3; }
sha256sum --quiet --check SHA256SUMS || fail "parts have changed since they were made; copy those named above again"

mkdir -p "$where"
unpacked=$(mktemp -d "$where/.unpacked.XXXXXX")
trap 'rm -rf "$unpacked"' EXIT
cat bundle.tar.* | tar -C "$unpacked" -xf -

"$python" - "$unpacked/made_for" << 'PY' || exit 2
import platform, sys
made = open(sys.argv[1]).read().split()
here = [*map(str, sys.version_info[:2]), platform.machine()]
if made[:3] != here:
    sys.exit("error: the bundle is for Python {}.{} on {}, and this is {}.{} on {}; name another by PYTHON=".format(*made[:3], *here))
try:
    import torch
except ImportError as error:
    sys.exit(f"error: {sys.executable} has no torch ({error}); name the cluster's own by PYTHON=")
if torch.__version__.split("+")[0] != made[3]:
    sys.exit(f"error: the bundle is for torch {made[3]}, and this is {torch.__version__}; make one with --torch {torch.__version__.split('+')[0]}")
PY

install=(-m pip --disable-pip-version-check install --quiet --no-index --find-links "$unpacked/wheels")
needed=(--requirement "$unpacked/requirements.txt")
if ((is_target)); then
  "$python" "${install[@]}" "${needed[@]}" --no-deps --upgrade --target "$where"
  export PYTHONPATH="$where${PYTHONPATH:+:$PYTHONPATH}"
  run=$python use="export PYTHONPATH=$where"
else
  "$python" -m venv "$where"
  run=$where/bin/python use="source $where/bin/activate"
  # Not --system-site-packages: PYTHON may itself be of a virtual environment, whose packages that leaves out.
  packages=$("$run" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  "$python" -c 'import site; print(*site.getsitepackages(), sep="\n")' > "$packages/packages_of_the_node.pth"
  "$run" -m pip --disable-pip-version-check uninstall --quiet --yes setuptools # an old one, in the node's way
  "$run" "${install[@]}" "${needed[@]}"
  # Ours in any case: the node may have some state of the same version.
  "$run" "${install[@]}" --no-deps --force-reinstall "$unpacked"/wheels/xdlm_megatron-*.whl
  # Transformer Engine looks for CUDA's libraries, which came with torch, in its own environment alone.
  "$python" - "$packages/nvidia" << 'PY'
import pathlib, site, sys
for packages in map(pathlib.Path, site.getsitepackages()):
    for library in (packages / "nvidia").glob("*/"):
        link = pathlib.Path(sys.argv[1], library.name)
        link.parent.mkdir(exist_ok=True)
        if not link.exists():
            link.symlink_to(library)
PY
  # The node's own torchrun starts the node's Python.
  printf '#!%s\nfrom torch.distributed.run import main\nmain()\n' "$run" > "$where/bin/torchrun"
  chmod +x "$where/bin/torchrun"
fi
mkdir -p "$where/xdlm_megatron_source" && tar -C "$where/xdlm_megatron_source" -xf "$unpacked/source.tar"

cd "$where/xdlm_megatron_source"
"$run" -W ignore - << 'PY'
import importlib.util, importlib.metadata as metadata
import torch  # before Transformer Engine, which looks for the libraries that it loads
names = ["torch", "megatron-core", "xdlm_megatron"]
if importlib.util.find_spec("transformer_engine"):  # before ours, which hides it where there is no GPU
    import transformer_engine.pytorch
    names.append("transformer-engine")
import megatron.core, xdlm_megatron.train.run
print("imports work:", ", ".join(f"{name} {metadata.version(name)}" for name in names))
PY
"$run" -m xdlm_megatron show-config examples/quickstart.yaml > /dev/null
echo "installed. To use it:  $use && cd $where/xdlm_megatron_source"
