from weft.polling import poll_in_calling_threads

poll_in_calling_threads()
