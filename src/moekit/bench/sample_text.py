"""A short text of several kinds, for measuring where the user gives none."""

TEXT = """\
The ferry leaves the island at half past six, and whoever misses it waits until noon. Most of the
passengers are schoolchildren who know the crew by name; the others carry parcels, bicycles, once a
goat. In winter, when the swell comes from the north-west, the captain decides on the pier whether
to go at all, and nobody argues with him.

def moving_average(values, width):
    total = sum(values[:width])
    yield total / width
    for old, new in zip(values, values[width:]):
        total += new - old
        yield total / width

Die Brücke wurde 1912 gebaut und dreimal erneuert, zuletzt nach dem Hochwasser von 1997. Sie trägt
heute zwei Gleise und einen Weg für Fußgänger; für Lastwagen ist sie zu schmal. Wer von Osten kommt,
sieht zuerst den Turm und erst hinter der Biegung die Stadt.

A train leaves at 8:15 and travels 210 kilometres at 84 kilometres an hour. It arrives after 2.5
hours, at 10:45. If it stopped for six minutes on the way, it would have to run at 87.5 kilometres
an hour to be on time.

Le marché se tient le mardi et le samedi. On y trouve des pommes, du fromage, des couteaux que l'on
aiguise sur place, et, au printemps, des plants de tomates. Les prix sont les mêmes qu'en ville,
mais on parle plus longtemps.

- Fill the tank to the mark, not above it.
- Open the valve slowly; the gauge must stay below 3 bar.
- Write the reading and the hour into the book.

El faro dejó de funcionar en 1984. Desde entonces lo cuida una familia que pinta la puerta cada año
de un color distinto, y los pescadores dicen que así saben en qué año están.
"""
