"""What only the HTTP API refuses."""

TEXTS = {
    "TOO_MANY_ANSWERS": "all prompts together may have at most {most} answers, not {found}",
}
