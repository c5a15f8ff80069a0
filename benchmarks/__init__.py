"""Measurements of tuneavideo that are not tests: agreement with the published code, speed, memory."""
