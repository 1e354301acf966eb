# SPDX-License-Identifier: Apache-2.0
"""Which setting to serve: what each one loses, what it takes, and the choice among them."""
