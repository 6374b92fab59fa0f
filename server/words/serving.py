"""What the server, its model, its engine and its disk cannot do."""

TEXTS = {
    "TOO_MANY_UPLOADS": "{most} uploads are under way already",
    "TOO_MANY_UPLOADS_OF_TOKEN": "this token has {most} uploads under way already",
}
