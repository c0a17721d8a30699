"""A contract that fails shows both sides."""

import pytest

pytest.register_assert_rewrite("ckpt_callbacks.testing")
