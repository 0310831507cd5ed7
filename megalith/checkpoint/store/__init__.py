"""megalith's own checkpoints: folders, manifests, saving, loading and editing."""
