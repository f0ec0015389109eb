"""Scripts of this folder `import root` first, so that they find the repository's modules from any working directory."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
