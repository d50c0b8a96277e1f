"""Runs a script under FSDP2 or DeepSpeed on CPU processes:  torchrun ... sharded_on_cpu.py SCRIPT ARGUMENTS.

accelerate takes up either plugin on accelerators only. Here its state is told that the CPU processes (gloo) are of that
kind; all that follows (prepare, backward, clipping) is accelerate's own and torch's or DeepSpeed's.
"""

import runpy
import sys
from typing import Any

from accelerate import state
from accelerate.utils import DistributedType

plain_init = state.AcceleratorState.__init__


def init(self: Any, *args: Any, fsdp_plugin: Any = None, deepspeed_plugin: Any = None, **kwargs: Any) -> None:
    known = self.initialized
    plain_init(self, *args, fsdp_plugin=fsdp_plugin, deepspeed_plugin=deepspeed_plugin, **kwargs)
    if known:
        return
    if fsdp_plugin is not None:
        kind = DistributedType.FSDP
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin = fsdp_plugin
    else:
        from deepspeed import comm  # type: ignore[import-not-found]

        kind = DistributedType.DEEPSPEED
        comm.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
        (plugin,) = deepspeed_plugin.values() if isinstance(deepspeed_plugin, dict) else (deepspeed_plugin,)
        plugin.set_mixed_precision(self._mixed_precision)
        plugin.select(_from_accelerator_state=True)
        self.deepspeed_plugins = {"default": plugin}
    self.distributed_type = state.PartialState._shared_state["distributed_type"] = kind


if __name__ == "__main__":
    state.AcceleratorState.__init__ = init
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
