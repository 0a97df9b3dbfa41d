"""`picotron trace`: what was recorded of a run, counted and drawn.

command.py     prints the tables, merges the ranks' files, has the pictures drawn
recording.py   a rank's file -> what happened, as records
count.py       how long a rank computed and waited; what was said along each axis
schedule.py    the picture of a step: forwards and backwards of each stage
ring.py        the picture of ring attention: whose keys a rank computes with
drawing.py     rows, blocks and strips, by matplotlib
"""
