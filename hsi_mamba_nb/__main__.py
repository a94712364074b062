"""python -m hsi_mamba_nb"""
import sys

from hsi_mamba_nb.cli import main

sys.exit(main())
