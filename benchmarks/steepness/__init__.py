"""Does the penalty's quadratic predict what learning new tasks did to the loss of old tasks?"""
