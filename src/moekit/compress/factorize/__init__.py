"""Replacing expert matrices by products of smaller ones, private or shared by a group."""
