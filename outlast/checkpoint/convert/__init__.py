"""Export and import: checkpoints to and from safetensors, PyTorch's DCP and ``torch.save`` files."""

from outlast.checkpoint.convert.convert import Exported, ForeignFormat, Imported, export_step, import_step

__all__ = ["Exported", "ForeignFormat", "Imported", "export_step", "import_step"]
