"""The layers of ``flash_attn`` that models import beside its functions."""
