// What every kernel that reads or writes the cache agrees on.
#pragma once

constexpr int PAGE = 64;  // tokens of a page, which is one attention block
