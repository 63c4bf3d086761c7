"""Our own words for the 80 categories of COCO, one category a line, its COCO name first.

It is shorter than the official list (github.com/LisaAnne/Hallucination, data/synonyms.txt) and
leaves out words that are more often something else in a caption (orange the colour stays, as it is
a category; "bow", "sub", "turkey", "seat" and "male" go). Results under different lists are not
comparable, so every result names its list; ``chair_vocabulary.read_synonyms`` reads the official
one.
"""

CATEGORIES = """
person, people, human, man, woman, boy, girl, child, kid, toddler, baby, infant, adult, teenager, \
lady, gentleman, guy, pedestrian, passenger, tourist, worker, police officer, policeman, \
policewoman, fireman, firefighter, soldier, chef, waiter, waitress, farmer, fisherman, doctor, \
nurse, student, businessman, cowboy, bride, groom, player, batter, pitcher, catcher, umpire, \
surfer, skier, snowboarder, skateboarder, skater, cyclist, bicyclist, motorcyclist, biker, rider, \
jockey, swimmer, spectator, shopper, driver, sister, brother, mother, father, grandmother, \
grandfather
bicycle, bike, tricycle, unicycle
car, automobile, sedan, suv, taxi, cab, taxicab, van, minivan, jeep, hatchback, convertible, \
limousine, limo
motorcycle, motorbike, motor bike, motor cycle, moped, scooter
airplane, aeroplane, air plane, plane, aircraft, airliner, jet, jetliner, biplane, seaplane
bus, minibus, trolleybus, school bus
train, locomotive
truck, lorry, pickup, firetruck, fire truck
boat, ship, sailboat, rowboat, motorboat, speedboat, houseboat, canoe, kayak, yacht, ferry, barge, \
dinghy, tugboat, gondola, catamaran
traffic light, traffic signal, stop light, stoplight
fire hydrant, hydrant
stop sign
parking meter
bench, pew
bird, duck, goose, swan, seagull, gull, pigeon, parrot, owl, eagle, hawk, crow, raven, \
sparrow, robin, chicken, rooster, hen, peacock, pelican, heron, flamingo, ostrich, penguin, \
hummingbird, finch, stork, parakeet, cockatoo
cat, kitten, kitty, tabby
dog, puppy, pup, terrier, poodle, bulldog, retriever, labrador, dachshund, sheepdog, beagle, \
collie, corgi, pug, spaniel, greyhound, chihuahua, dalmatian, hound
horse, pony, foal, colt, mare, stallion
sheep, lamb, ram, ewe, goat
cow, cattle, bull, calf, ox, heifer, bison, buffalo
elephant
bear, panda, polar bear, grizzly
zebra
giraffe
backpack, rucksack, knapsack, back pack
umbrella, parasol
handbag, purse, hand bag
tie, necktie, bow tie, bowtie
suitcase, luggage, suit case
frisbee
skis, ski
snowboard
sports ball, ball, football, basketball, volleyball
kite
baseball bat
baseball glove, baseball mitt
skateboard
surfboard, surf board, bodyboard
tennis racket, tennis racquet, racket, racquet
bottle
wine glass, wineglass
cup, mug, teacup
fork
knife
spoon
bowl
banana
apple
sandwich, burger, hamburger, cheeseburger, panini
orange
broccoli
carrot
hot dog, hotdog
pizza
donut, doughnut
cake, cupcake, cheesecake
chair, armchair, stool, highchair, high chair
couch, sofa, loveseat, futon
potted plant, houseplant, house plant
bed
dining table, table, desk
toilet, urinal
tv, television, monitor, flatscreen
laptop, laptop computer, macbook, netbook
mouse
remote, remote control
keyboard
cell phone, cellphone, mobile phone, phone, telephone, smartphone, iphone
microwave
oven, stove
toaster
sink, washbasin
refrigerator, fridge, freezer
book
clock
vase
scissors
teddy bear, teddy
hair drier, hairdryer, hair dryer, blow dryer
toothbrush, tooth brush
"""
