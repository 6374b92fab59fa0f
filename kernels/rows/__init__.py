"""Operations on a CPU in which a row's bits do not depend on the batch."""
