"""`python -m megatron_fipo.cli`."""

import sys

from megatron_fipo.cli.main import main

sys.exit(main())
