"""Names that vLLM, its configuration and this plugin share."""

ARCHITECTURE = "LactForCausalLM"
"""What config.json calls the model."""

SLOTS = "kvbind_slots"
"""Of vLLM's additional configuration, how many requests at once the pool is asked to have room for."""
