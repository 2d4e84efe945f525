"""The only Ray code of the library: sessions, parallel maps, data streams, trainers."""
