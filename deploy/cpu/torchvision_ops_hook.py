"""Start-up hook: lets a torchvision whose compiled operators cannot load be imported all the same.

A CUDA build of torchvision next to a CPU build of torch finds no CUDA libraries, so its extension
does not load. Its Python code then registers fake versions of the operators `nms` and `qnms`, which
nobody has declared, and the import fails. Declaring the two schemas is enough: what vLLM and
transformers use are torchvision's image transforms, which are plain torch.

`fixes.py` copies this module into an environment's site-packages, next to a `.pth` file that
imports it whenever Python starts. Start-up stays cheap: nothing but a finder is installed, which
waits for `torchvision.extension`. Once that module has run it knows whether the operators loaded;
the schemas are declared only if they did not, so a sound torchvision is left alone.
"""

import sys
from importlib.machinery import PathFinder

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_libraries = []  # a torch.library.Library withdraws its schemas when it is garbage-collected


def _declare_missing_operators(extension):
    if extension._has_ops():
        return
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(name + _SCHEMA)
    _libraries.append(library)


class _TorchvisionExtensionFinder:
    """Finds `torchvision.extension` as usual and adds a step after it has run."""

    @staticmethod
    def find_spec(fullname, path=None, target=None):
        if fullname != "torchvision.extension":
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        run_module = spec.loader.exec_module

        def run_then_declare(module):
            run_module(module)
            _declare_missing_operators(module)

        spec.loader.exec_module = run_then_declare
        return spec


sys.meta_path.insert(0, _TorchvisionExtensionFinder)
