"""Every sentence of the trainer's errors, by its reason."""

from turret.server.words import requests, start
from turret.server.words.text import sayer

TEXTS = {
    "NO_CONFIG": "{path} does not exist; `turret train init` writes one",
    "NOT_KEY_VALUE": "must be TABLE.KEY=VALUE, not {value!q}",
    "LABELS_ARE_LEARNED": 'must be "completion" for a classification, whose labels are learned',
}

say = sayer(requests.TEXTS, start.TEXTS, TEXTS)
