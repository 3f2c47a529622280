from .base import Backbone, BackboneCache, States
from .huggingface import huggingface_backbone
from .paper_gpt import PaperGPTConfig, paper_gpt

__all__ = ["Backbone", "BackboneCache", "PaperGPTConfig", "States", "huggingface_backbone", "paper_gpt"]
