import sys
from pathlib import Path


# The recipes are scripts: Python finds their neighbours because they lie in the folder of the script.
sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
