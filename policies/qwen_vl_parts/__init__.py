"""The parts of policies/qwen_vl.py."""
