"""Rivals on their own ground: our searches under the cost terms of Piper, Galvatron and Aceso; Alpa's logged runs."""
