package main

func terminal(string) error { return nil }
