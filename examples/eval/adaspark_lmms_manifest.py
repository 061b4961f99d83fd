"""What lmms-eval's plugin mechanism reads: which model there is, and where.

Apart from the model itself, which imports lmms-eval while that is still looking for plugins.
"""

from lmms_eval.models.registry_v2 import ModelManifest

MANIFEST = ModelManifest("adaspark", chat_class_path="adaspark_lmms.AdaSparkServer")
