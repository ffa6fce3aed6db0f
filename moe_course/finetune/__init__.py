"""Fine-tuning of sparse models: adapters on stacked experts."""
