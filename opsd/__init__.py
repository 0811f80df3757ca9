"""The package behind the programs. Importing it checks that the program and the package belong to the same clone."""

import sys
from pathlib import Path

# An editable install leads to one clone. A program of another clone (`python eval/evaluate_math.py`) that is started
# in the environment of this clone would silently run the modules of this clone.
_root = Path(__file__).resolve().parents[1]
_program = Path(getattr(sys.modules["__main__"], "__file__", None) or __file__).resolve()
_program_root = _program.parent.parent
if _program_root != _root and (_program_root / "opsd" / "__init__.py").is_file():
    raise ImportError(
        f"{_program} would import the modules of {_root}: activate the .venv of its own folder (made there by "
        f"scripts/setup_env.sh), or set PYTHONPATH={_program_root}"
    )
