"""From curves to decisions: policies replayed, limits with their uncertainty."""
