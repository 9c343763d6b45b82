"""Edge-cloud collaborative inference: a network cut in two, and the tensor at the cut sent over a wire in few bits.

    cuts = find_cuts(net, images[:1])                        where one tensor is all that is alive
    edge, cloud = split_at(net, cuts[7])                     two graphs; cloud(edge(x)) is net(x)
    record = integer_edge(qnet, lower(qnet), cuts[7])        the edge half, for integer.output_integers and others
    wire = fit_wire(activations, cuts[7].name, bits=2)       what both ends agree on before the first image
    packets = pack(wire, codes, coding="deflate")            one packet of bytes per image
    logits = cloud(wire.decode(unpack(wire, packets)))

``cuts`` where and into what; ``wire`` the grid of the sent tensor, its packets and their checks; ``pictures`` what an
edge without a network would send instead: pixels of few bits, or JPEG.
"""

from hq_lib.deploy.edge_cloud.cuts import Cut, find_cuts, integer_edge, split_at
from hq_lib.deploy.edge_cloud.pictures import from_jpeg, pixel_wire, to_jpeg
from hq_lib.deploy.edge_cloud.wire import (
    CODINGS,
    HEADER_BYTES,
    PacketError,
    Wire,
    WireError,
    fit_wire,
    float_wire,
    pack,
    unpack,
)
