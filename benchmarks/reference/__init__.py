"The literal algorithms: plain, slow, and the yardstick"
