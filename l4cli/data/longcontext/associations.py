"""What everybody knows, in pairs: how a text says it, how a question asks for it.

out: pairs without a content word in common, and the names of people to say it of
"""

from __future__ import annotations

PEOPLE: tuple[str, ...] = (
    *("Aldous", "Beatrix", "Cosmo", "Delphine", "Edmund", "Fenella", "Gideon", "Henrike"),
    *("Ignatius", "Jolanda", "Kasimir", "Leocadia", "Magnus", "Nerissa", "Ottoline", "Percival"),
    *("Quentin", "Rosalba", "Sigmund", "Theodora", "Ulrika", "Valerian", "Wilhelmina", "Xaver"),
    *("Yolande", "Zacharias", "Ambrose", "Brunhild", "Crispin", "Dorothea", "Erasmus", "Florian"),
)
_PLACES = """
is painting the Eiffel Tower from a hotel window > France
keeps a stall near the Colosseum > Italy
feeds pigeons on Trafalgar Square > England
sells postcards beneath the Acropolis > Greece
guides groups through the Alhambra > Spain
cleans windows at the Brandenburg Gate > Germany
sweeps the steps of the Taj Mahal > India
jogs along the Great Wall > China
sketches Mount Fuji each spring > Japan
rents out camels by the pyramids of Giza > Egypt
rows past the Sydney Opera House > Australia
photographs the Statue of Liberty at dawn > the United States
restores mosaics in Hagia Sophia > Turkey
herds llamas below Machu Picchu > Peru
teaches samba on Copacabana > Brazil
dances tango in Buenos Aires > Argentina
skates on the canals of Amsterdam > the Netherlands
eats waffles beside the Atomium > Belgium
climbs the Matterhorn in summer > Switzerland
waltzes at the Hofburg > Austria
drives a tram through Lisbon > Portugal
fishes off the Lofoten islands > Norway
lives in a wooden house in Stockholm > Sweden
sits in a sauna in Helsinki > Finland
bathes in the springs of Reykjavik > Iceland
visits the little mermaid in Copenhagen > Denmark
plays the fiddle in a Dublin pub > Ireland
watches for the monster of Loch Ness > Scotland
crosses the Charles Bridge to work > the Czech Republic
swims in the baths of Budapest > Hungary
guards the gates of the Kremlin > Russia
prays in the cathedral of Krakow > Poland
rides a tuk-tuk to the temples of Bangkok > Thailand
studies the carvings of Angkor Wat > Cambodia
kayaks among the rocks of Halong Bay > Vietnam
surfs off the beaches of Bali > Indonesia
works on the top floor of the Petronas Towers > Malaysia
studies tortoises on the Galapagos > Ecuador
lights candles in the rock of Petra > Jordan
counts lions on the plains of the Masai Mara > Kenya
leads climbers up Kilimanjaro > Tanzania
brews coffee in Addis Ababa > Ethiopia
haggles in the souks of Marrakesh > Morocco
looks up at Table Mountain over breakfast > South Africa
shears sheep outside Wellington > New Zealand
plays ice hockey in Toronto > Canada
listens to mariachi bands in Guadalajara > Mexico
rolls cigars in Havana > Cuba
sails through the locks at Colon > Panama
walks along the Dead Sea in Tel Aviv's buses > Israel
"""
_TRADES = """
lands passenger jets in heavy rain > is a pilot
fills teeth all week > is a dentist
bakes loaves before sunrise > works in a bakery
puts out burning roofs > fights fires
milks forty cows at five > runs a farm
delivers letters from door to door > works for the post
cuts hair and trims beards > is a barber
mends leaking pipes > is a plumber
hammers horseshoes at a forge > is a smith
digs up pots from Roman graves > is an archaeologist
looks at distant galaxies all night > is an astronomer
grinds lenses for weak eyes > is an optician
pulls coal out of a shaft > is a miner
keeps forty hives behind the shed > makes honey
shoes, saddles and trains thoroughbreds > knows horses
steers a submarine > serves in the navy
measures rainfall and predicts storms > studies the weather
treats sick dogs and cats > is a vet
lends novels and stamps return dates > is a librarian
defends the accused before a jury > is a lawyer
proves theorems about primes > is a mathematician
pours molten sand into vases > blows glass
arranges roses for weddings > is a florist
wears a wig and sentences thieves > is a judge
conducts symphonies with a baton > is a musician
"""
_WAYS = """
never touches meat or fish > is a vegetarian
sneezes whenever birches bloom > has hay fever
cannot tell red from green > is colour-blind
gets ill from the gluten in bread > avoids wheat
sleeps all day and wakes at dusk > is active at night
has read every play about Hamlet and Macbeth > loves Shakespeare
owns eleven kittens > likes cats
moves bishops and rooks with great care > plays chess
ran forty-two kilometres on Sunday > has finished a marathon
scored with a header in the last minute > plays football
serves aces on grass courts > plays tennis
pedalled up the Tourmalet > rides a bicycle
has a twin of the same age > has a sibling
faints on tall ladders > is afraid of heights
trembles when a web is near > is afraid of spiders
put on a ring at the altar in June > is married
lost all hair years ago > is bald
uses the left hand to write > is not right-handed
reads with the fingertips > is blind
speaks with signs alone > is deaf
crossed a desert without a drop to drink > has been very thirsty
saw the earth from the space station > has been in orbit
turned one hundred last week > was born a century ago
paints sunflowers in the manner of van Gogh > admires a Dutch artist
hums the Moonlight Sonata all day > admires Beethoven
"""


def _pairs(text: str, before: str = "") -> list[tuple[str, str]]:
    lines = [line.split(" > ") for line in text.strip().splitlines()]
    return [(said, before + asked) for said, asked in lines]


ASSOCIATIONS: tuple[tuple[str, str], ...] = (
    *_pairs(_PLACES, "has been in "),
    *_pairs(_TRADES),
    *_pairs(_WAYS),
)
