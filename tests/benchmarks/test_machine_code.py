"""Instructions counted on texts such as nvdisasm prints."""

from __future__ import annotations

import pytest

from benchmarks.machine_code import instructions

STRAIGHT = """
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA `(.L_x_1) ;
        /*0020*/                   LDG.E.128 R4, [R2.64] ;
        /*0030*/                   FADD R4, R4, R5 ;
        /*0040*/                   BRA `(.L_x_2) ;
.L_x_1:
        /*0050*/                   FMUL R4, R4, R5 ;
.L_x_2:
        /*0060*/                   EXIT ;
        /*0070*/                   NOP;
"""
LOOP = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDG.E.128 R4, [R2.64] ;
        /*0020*/                   FADD R4, R4, R5 ;
        /*0030*/               @P0 BRA `(.L_x_0) ;
        /*0040*/                   STG.E [R2.64], R4 ;
.L_x_1:
        /*0050*/                   ATOMG.E.ADD R4, [R2.64], R5 ;
        /*0060*/               @P1 BRA `(.L_x_1) ;
        /*0070*/                   EXIT ;
.L_x_2:
        /*0080*/                   BRA `(.L_x_2);
"""


@pytest.mark.parametrize(
    ("sass", "whole", "count"),
    [(STRAIGHT, False, 6), (STRAIGHT, True, 7), (LOOP, False, 3), (LOOP, True, 9)],
    ids=["the longer way", "all", "one turn of the loop that reads", "all of it"],
)
def test_instructions(sass: str, whole: bool, count: int) -> None:
    assert instructions(sass, whole) == count
