from testreg import Family

GARDEN_VIT = Family("GardenViT", "trunk", down="shrink", attention="attn", prefix=1, package="garden")
