"""Probes of text encoders: what does a text encoder know of what it has never, or only through training, seen?"""

from mmpt.probing.comparison import compare as compare
from mmpt.probing.embedders import Embedder as Embedder
from mmpt.probing.embedders import FunctionEmbedder as FunctionEmbedder
from mmpt.probing.embedders import ModelEmbedder as ModelEmbedder
from mmpt.probing.loading import load_embedder as load_embedder
from mmpt.probing.scoring import summary as summary
from mmpt.probing.stroop import PRESETS as PRESETS
from mmpt.probing.stroop import ProbeResult as ProbeResult
from mmpt.probing.stroop import StroopProbe as StroopProbe
from mmpt.probing.stroop import StroopSettings as StroopSettings
from mmpt.probing.task import Task as Task
from mmpt.probing.task import load_task as load_task
