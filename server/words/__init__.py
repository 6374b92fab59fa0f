"""Every sentence of the server's errors, by its reason."""

from turret.server.words import adapters, http, hub, requests, serving, start
from turret.words import Text as Text
from turret.words import printable as printable
from turret.words import sayer

say = sayer(requests.TEXTS, adapters.TEXTS, serving.TEXTS, http.TEXTS, hub.TEXTS, start.TEXTS)
