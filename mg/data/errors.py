"""What the data layer raises when an index or a whole data set is at fault."""


class DataError(ValueError):
    """An index, or a data set as a whole, that cannot be used; the message names file, row and what would be right."""
