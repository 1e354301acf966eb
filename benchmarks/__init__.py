# SPDX-License-Identifier: Apache-2.0
"""What measures: run as ``.venv/bin/python -m benchmarks.NAME [--json] [--smoke] [--out FILE]``."""
