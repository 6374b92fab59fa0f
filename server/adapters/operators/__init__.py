"""What an adapter does to the base: its operators, by module, with their tensors."""
