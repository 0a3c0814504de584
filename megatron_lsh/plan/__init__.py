"""What a run will cost, before it is started: parameters, memory, FLOPs, and the time that an all-to-all takes."""
