"""Names and things for the split "fusion" of all tasks.

If a word occurred only in the examples of one task, the gate would learn to recognise the task by
it, and would fail on other words.
"""

from __future__ import annotations

from .task import words

FIRST_NAMES = words(
    "Beatrix, Mateo, Anya, Gideon, Leila, Rafael, Sven, Yasmin, Tobias, Marisol, Kofi, Elena, "
    "Dmitri, Freya, Isabel, Jonas, Keiko, Lucian, Miriam, Naveen, Olga, Pablo, Quentin, "
    "Renata, Stefan, Tamara, Ulrich, Vera, Wilhelm, Zahra, Ilya, Eva, Luis, Ada, Marta, Jon, "
    "Priscilla, Tariq, Helga, Bruno, Sofia, Kwame, Nils, Carmen, Theo, Anika, Rolf, Dara, "
    "Emil, Paloma"
)
LAST_NAMES = words(
    "Almeida, Bergstrom, Castillo, Dimitrov, Eriksen, Ferrari, Goldberg, Horvat, Ibrahim, "
    "Jankowski, Kaplan, Lindgren, Mendoza, Nguyen, Ochoa, Pereira, Quinn, Rahimi, Santos, "
    "Takahashi, Ueda, Vasquez, Whitaker, Yilmaz, Zimmerman, Burke, Chaudhry, Dalton, Engel, "
    "Hollis, Quill, Reyes, Bell, Strand, Ortega, Okada, Ferro, Whitlock, Brandt, Moreno, "
    "Sund, Achebe, Keane, Varga, Osman, Lindt, Prado, Winter, Zeller, Ferris, Takeda, Banks, "
    "Olsen"
)
PLACES = words(
    "Lyon, Krakow, Amman, Glasgow, Perth, Tbilisi, Cusco, Nantes, Bergen, Dakar, Utrecht, "
    "Sapporo, Granada, Winnipeg, Leipzig, Turin, Gdansk, Tucson, Malmo, Aarhus, Doha, Maputo, "
    "Cardiff, Izmir, Kazan, Bilbao, Tampa, Graz, Basel, Yerevan, Muscat, Halifax, Toulouse, "
    "Fresno, Hobart, Puebla, Ghent, Old Harbor, Westgate, Mill Quarter, St. Anne, Ashford, "
    "Dunmore, Kings Vale, Alberta, Manitoba, Nova Scotia, Tansy Creek, Loire, Hollow Oak, "
    "Harlow, Eastbrook, Jura, Kent, Galway, Umbria, Lapland, Baker Street, Pine Hill, "
    "Rosedale, Cape Verne, Trieste, Odessa, Madras, Salta, Vigo, Turku"
)
THINGS = words(
    "scarves, copper kettles, drawers, purple curtains, kites, whistles, ceramic bowls, "
    "flashlights, batteries, orange tents, violins, doormats, gold frames, sketchbooks, "
    "cushions, trumpets, rain boots, teapots, fishing rods, striped ties, lanterns, sculptor, "
    "editor, surgeon, welder, geologist, tour guide, chemist, optician, sailor, economist, "
    "composer, blacksmith, midwife, detective, zookeeper, cashier, beekeeper, roofer, beagle, "
    "collie, Shiba Inu, Great Dane, crimson, teal, matte black, tropical, polar, semi-arid, "
    "Pacific, Arctic, oak, marble, velvet, copper, bamboo, gothic, modern, rustic, baroque, "
    "lemon, indigo, coral, wool, ceramic, granite, foggy, mild"
)
TOPICS = words(
    "recycling, the mentor program, staffing, the new canteen, data privacy, the charity run, "
    "the merger, onboarding, traffic, the print catalog, wages, the newsletter, renovation, "
    "the holiday calendar, the pilot study, packaging, night shifts, the audit"
)
