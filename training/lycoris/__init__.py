"""LoHa and LoKr on NF4 modules, whose layers PEFT lacks."""
