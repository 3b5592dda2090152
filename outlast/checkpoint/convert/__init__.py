"""Checkpoints to and from other formats: safetensors, PyTorch's DCP, ``torch.save`` files."""

from outlast.checkpoint.convert.convert import Exported, ForeignFormat, Imported, export_step, import_step

__all__ = ["Exported", "ForeignFormat", "Imported", "export_step", "import_step"]
